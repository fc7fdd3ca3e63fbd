"""The HTTP edge: read, call one service, render. File names are the first path segment after `/api`."""
