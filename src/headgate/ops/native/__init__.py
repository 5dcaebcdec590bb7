"""What the compiled backends share: this CPU's registers, its threads, and fresh memory."""
