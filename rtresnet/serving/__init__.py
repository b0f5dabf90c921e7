"""An artifact as somebody else's server takes it."""
