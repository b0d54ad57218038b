"""Fine-tuning from end to end: what several commands share. A task, a start, a run, an honest score, a model again."""
