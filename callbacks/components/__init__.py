"""What several callbacks share: when they act, and how they evaluate without a change to the training."""
