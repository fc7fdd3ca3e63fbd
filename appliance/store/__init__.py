"""What the appliance remembers: one encrypted SQLite file. The only SQL of the project is in this package."""
