"""Training: the loop, its checkpoint, optimisers, several processes, a teacher."""
