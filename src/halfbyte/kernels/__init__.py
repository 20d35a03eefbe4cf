"""Fast maths on packed weights: each op a folder with a slow float64 reference next to what is fast."""
