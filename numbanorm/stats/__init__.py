"""Statistics by themselves: moments that merge, parts of groups, fitting, synchronization between processes."""
