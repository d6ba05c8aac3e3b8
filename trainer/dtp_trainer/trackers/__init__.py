"""Where the metrics of a job go besides: W&B and TensorBoard, fed by a process beside the agent.

``python -m dtp_trainer.trackers`` reads an `About` and then the records of the job from its stdin.
Nothing of it runs in a rank or in the agent, so a tracker that is slow, fails or hangs costs its
curves and nothing else.
"""
