"""The worker's command line: an image and a prompt to an endpoint, an MP4 back. Needs only httpx and rich."""
