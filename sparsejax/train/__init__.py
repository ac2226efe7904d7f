"""What a run needs: the step, the optimiser, checkpoints, metrics, the loop."""
