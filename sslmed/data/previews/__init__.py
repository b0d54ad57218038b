"""Pictures of what a network will see."""
