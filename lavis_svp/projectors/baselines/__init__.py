"""The projectors that SVP is compared with, written from their sources' formulas; docs/projectors.md lists them."""
