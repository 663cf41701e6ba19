"""Expert parallelism: meshes, the exchange of tokens between chips, and the shard_map body that uses both."""
