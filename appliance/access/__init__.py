"""The rules of access: keys, scopes, plans. Pure, with `now` passed in; nothing here touches the store or HTTP."""
