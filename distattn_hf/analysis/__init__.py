"""What a model attends to: weights, statistics, comparisons, interventions."""
