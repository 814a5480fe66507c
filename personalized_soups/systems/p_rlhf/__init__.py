"""P-RLHF (arXiv 2402.05133): soft tokens for each user, trained together with a LoRA adapter by the P-DPO loss."""
