"""`make gpu`: what needs a GPU, stage by stage."""
