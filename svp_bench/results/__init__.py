"""Results: the record schema (`record`), the tables derived from records (`tables`), quoted numbers (`published`).

Nothing here imports torch.
"""
