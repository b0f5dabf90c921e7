"""Images and a net in, a checkpoint out."""
