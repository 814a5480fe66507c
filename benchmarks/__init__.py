"""What merging costs on this machine, beside PEFT, mergekit, `cp` and a plain memory copy: `make bench`."""
