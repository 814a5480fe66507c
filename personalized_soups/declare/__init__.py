"""What people write in files: profiles, catalogues of preferences, training recipes. No torch in here."""
