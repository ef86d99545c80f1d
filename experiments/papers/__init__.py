"""What the papers claim, by experiment: lists of `kit.claims.Claim`, where a script has many."""
