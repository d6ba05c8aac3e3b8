"""What runs inside a worker; imports nothing of ours from above."""
