"""What leaves this machine: a model card, and a student on the Hub."""
