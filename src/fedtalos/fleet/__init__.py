"""A fleet: the same rounds with clients on other machines, over Flower (docs/fleet.md)."""
