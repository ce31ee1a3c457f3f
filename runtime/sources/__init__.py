"""Where bundles and adapters come from: registries, web servers, the hub and folders; no torch."""
