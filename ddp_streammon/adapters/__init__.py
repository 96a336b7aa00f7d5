"""The monitor in others' training loops: each module chooses the moment and calls it, and needs its own framework."""
