"""One file per variant; every file here is discovered and registered on first use."""
