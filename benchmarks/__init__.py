"""What merging costs on this machine, compared with PEFT, mergekit, `cp` and a memory copy: `make bench`."""
