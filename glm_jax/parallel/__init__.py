"""Ground floor: the device mesh and the rules that say how every array lies on it."""
