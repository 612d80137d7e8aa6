"""What can be trained: a plan for each kind of model, and the clips it trains on."""
