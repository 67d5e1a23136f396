"""What a pruning method is, how it is found, and when it cuts a job's model."""
