"""What people write in files: profiles, catalogues of preferences, recipes. This package imports no torch."""
