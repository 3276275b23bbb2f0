//! The one image of a run: as small as an image may be.

use bulkhead_proto::Digest;
use sha2::{Digest as _, Sha256};

/// Its name.
pub(crate) const NAME: &str = "wire:1";

/// A blob and its digest.
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) content: Vec<u8>,
}

impl Blob {
    fn new(content: impl Into<Vec<u8>>) -> Self {
        let content = content.into();
        Self {
            digest: Digest::from_bytes(Sha256::digest(&content).into()),
            content,
        }
    }

    fn descriptor(&self, kind: &str) -> serde_json::Value {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{}", self.digest.hex()),
            "size": self.content.len(),
        })
    }
}

/// Layer, configuration and manifest, in the order in which they are sent.
pub(crate) fn blobs() -> [Blob; 3] {
    let layer = Blob::new([0; 1024]); // an empty archive
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = Blob::new(
        serde_json::json!({
            "architecture": architecture,
            "os": "linux",
            "config": { "Entrypoint": ["/task"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", layer.digest.hex())] },
        })
        .to_string(),
    );
    let manifest = Blob::new(
        serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor("config.v1+json"),
            "layers": [layer.descriptor("layer.v1.tar")],
        })
        .to_string(),
    );
    [layer, config, manifest]
}
