"""From pairs of answers to an expert: preference data, DPO through TRL, resumable to the byte."""
