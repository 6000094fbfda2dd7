"""What outlives a build, by digest: blobs of base images and root filesystems of builders."""
