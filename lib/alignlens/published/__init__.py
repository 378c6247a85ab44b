"""The published study's protocols, to the formula."""
