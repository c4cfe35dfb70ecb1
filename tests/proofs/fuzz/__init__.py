"""Files changed at random with their structure kept, and what each reader makes of them."""
