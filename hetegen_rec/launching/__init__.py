"""Starting jobs: components for torchx."""
