"""What is measured: each experiment runs some ways in turns and fills the rows that they are for."""
