"""The worker's jobs. Knows requests, sections and deadlines; imports no RunPod and no HTTP server."""
