"""Training on several ranks: the device mesh, the communication between ranks, and a watchdog for ranks that hang."""
