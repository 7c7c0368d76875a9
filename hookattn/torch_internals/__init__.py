"""What is private of torch, each piece in one place: the rest of the package asks here."""
