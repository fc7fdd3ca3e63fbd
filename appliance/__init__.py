"""The appliance: a language model for a whole team on its own box. Import from the module that owns a name."""

__version__ = "0.1.0"
