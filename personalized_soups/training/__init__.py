"""Train experts on pairs of answers by DPO with TRL. A resumed training gives the bytes of an uninterrupted one."""
