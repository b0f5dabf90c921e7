"""The paper's analyses of its own nets."""
