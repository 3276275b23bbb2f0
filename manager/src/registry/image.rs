//! What an image's manifest and config say, believed only where it can be checked.
//!
//! OCI image specification 1.1: manifest.md and config.md. Unknown fields are allowed there and passed over here;
//! `urls` of a descriptor are never followed.

use std::collections::BTreeMap;

use bulkhead_proto::wire::{ImageConfig, ImageLayer};
use bulkhead_proto::{Digest, limits};
use serde::Deserialize;

use super::BlobError;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYERS: [&str; 3] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
];

/// The architecture that this cluster's programs are built for, in the words of Go that OCI uses.
const ARCHITECTURE: &str = match std::env::consts::ARCH.as_bytes() {
    b"x86_64" => "amd64",
    b"aarch64" => "arm64",
    _ => "unknown",
};

/// Why an image is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A blob is missing or damaged.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// Two descriptors, or a descriptor and the blob, give one content two sizes.
    #[error("{digest} is said to have {said} bytes and has {found}")]
    Size {
        /// The blob.
        digest: Digest,
        /// By its descriptor.
        said: u64,
        /// In truth, or by another descriptor.
        found: u64,
    },
    /// A document is over its limit.
    #[error("the {what} has {size} bytes; the limit is {}", limits::MANIFEST_BYTES)]
    TooLarge {
        /// Which.
        what: &'static str,
        /// Bytes.
        size: u64,
    },
    /// A document does not read.
    #[error("the {what} is not valid: {reason}")]
    Malformed {
        /// Which.
        what: &'static str,
        /// Where.
        reason: String,
    },
    /// A valid image that this cluster does not run.
    #[error("the image is not supported: {0}")]
    Unsupported(String),
}

fn unsupported(reason: impl Into<String>) -> ImageError {
    ImageError::Unsupported(reason.into())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ManifestFile {
    schema_version: u32,
    media_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct ConfigFile {
    architecture: String,
    os: String,
    config: Option<Execution>,
    rootfs: RootFs,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: String,
    diff_ids: Vec<String>,
}

/// A checked manifest.
pub(super) struct Manifest {
    pub(super) config: Digest,
    pub(super) config_size: u64,
    layers: Vec<(Digest, u64, String)>,
}

fn read<T: serde::de::DeserializeOwned>(what: &'static str, content: &[u8]) -> Result<T, ImageError> {
    if content.len() > limits::MANIFEST_BYTES {
        return Err(ImageError::TooLarge {
            what,
            size: content.len() as u64,
        });
    }
    serde_json::from_slice(content).map_err(|error| ImageError::Malformed {
        what,
        reason: error.to_string(),
    })
}

fn digest(what: &'static str, text: &str) -> Result<Digest, ImageError> {
    text.parse().map_err(
        |error: bulkhead_proto::ids::ParseDigestError| ImageError::Malformed {
            what,
            reason: error.to_string(),
        },
    )
}

impl Manifest {
    pub(super) fn parse(content: &[u8]) -> Result<Self, ImageError> {
        let file: ManifestFile = read("manifest", content)?;
        if file.schema_version != 2 || file.media_type.is_some_and(|kind| kind != MANIFEST) {
            return Err(unsupported("its manifest is not of the OCI kind, version 2"));
        }
        if file.config.media_type != CONFIG {
            return Err(unsupported(format!(
                "its config is a '{}'",
                short(&file.config.media_type)
            )));
        }
        if file.config.size > limits::MANIFEST_BYTES as u64 {
            return Err(ImageError::TooLarge {
                what: "config",
                size: file.config.size,
            });
        }
        if file.layers.is_empty() || file.layers.len() > limits::IMAGE_LAYERS {
            return Err(unsupported(format!(
                "it has {} layers; from 1 to {} are possible",
                file.layers.len(),
                limits::IMAGE_LAYERS
            )));
        }
        let config = digest("manifest", &file.config.digest)?;
        let mut sizes = BTreeMap::from([(config, file.config.size)]);
        let mut layers = Vec::new();
        for layer in file.layers {
            if !LAYERS.contains(&layer.media_type.as_str()) {
                return Err(unsupported(format!(
                    "a layer is a '{}'; layers are tar, tar+gzip or tar+zstd",
                    short(&layer.media_type)
                )));
            }
            let digest = digest("manifest", &layer.digest)?;
            if layer.size > limits::BLOB_BYTES {
                return Err(BlobError::TooLarge {
                    digest,
                    size: layer.size,
                }
                .into());
            }
            let found = *sizes.entry(digest).or_insert(layer.size);
            if found != layer.size {
                return Err(ImageError::Size {
                    digest,
                    said: layer.size,
                    found,
                });
            }
            layers.push((digest, layer.size, layer.media_type));
        }
        Ok(Self {
            config,
            config_size: file.config.size,
            layers,
        })
    }
}

/// A text from an image in an answer to a person.
fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

/// What the image object says, and the blobs that must stand before it is committed.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// The config's digest and size.
    pub config: (Digest, u64),
    /// Lowest first.
    pub layers: Vec<ImageLayer>,
    /// What tasks take from the config.
    pub run: ImageConfig,
    /// Bytes of all blobs, each counted once.
    pub size: u64,
    /// Every blob once, with its size.
    pub blobs: Vec<(Digest, u64)>,
}

/// Reads a manifest and the config that it names.
pub fn describe(manifest: Digest, content: &[u8], config: &[u8]) -> Result<Described, ImageError> {
    let parsed = Manifest::parse(content)?;
    let file: ConfigFile = read("config", config)?;
    if file.os != "linux" || file.architecture != ARCHITECTURE {
        return Err(unsupported(format!(
            "it is for {}/{}, this cluster runs linux/{ARCHITECTURE}",
            short(&file.os),
            short(&file.architecture)
        )));
    }
    let diff_ids = &file.rootfs.diff_ids;
    if file.rootfs.kind != "layers" || diff_ids.len() != parsed.layers.len() {
        return Err(unsupported(format!(
            "its config names the content of {} layers, its manifest has {}",
            diff_ids.len(),
            parsed.layers.len()
        )));
    }
    let mut layers = Vec::new();
    for ((digest_, size, media_type), diff_id) in parsed.layers.iter().zip(diff_ids) {
        layers.push(ImageLayer {
            digest: digest_.as_bytes().to_vec(),
            size: *size,
            media_type: media_type.clone(),
            diff_id: digest("config", diff_id)?.as_bytes().to_vec(),
        });
    }
    let blobs: BTreeMap<Digest, u64> = parsed
        .layers
        .iter()
        .map(|(digest, size, _)| (*digest, *size))
        .chain([
            (parsed.config, parsed.config_size),
            (manifest, content.len() as u64),
        ])
        .collect();
    Ok(Described {
        config: (parsed.config, parsed.config_size),
        layers,
        run: execution(file.config.unwrap_or_default())?,
        size: blobs.values().sum(),
        blobs: blobs.into_iter().collect(),
    })
}

fn execution(said: Execution) -> Result<ImageConfig, ImageError> {
    let list = |what: &str, list: Option<Vec<String>>, entries: usize, bytes: usize| {
        let list = list.unwrap_or_default();
        if list.len() > entries
            || list
                .iter()
                .any(|entry| entry.len() > bytes || entry.contains('\0'))
        {
            let reason = format!(
                "its {what} has more than {entries} entries, or one of more than {bytes} bytes or with a zero byte"
            );
            return Err(unsupported(reason));
        }
        Ok(list)
    };
    let text = |what: &str, text: Option<String>| {
        let text = text.unwrap_or_default();
        if text.len() > 4_096 || text.contains('\0') {
            return Err(unsupported(format!("its {what} is too long or has a zero byte")));
        }
        Ok(text)
    };
    Ok(ImageConfig {
        entrypoint: list(
            "entry point",
            said.entrypoint,
            limits::ARGUMENTS,
            limits::ARGUMENT_BYTES,
        )?,
        command: list("command", said.cmd, limits::ARGUMENTS, limits::ARGUMENT_BYTES)?,
        environment: list(
            "environment",
            said.env,
            limits::ENVIRONMENT_ENTRIES,
            limits::ENVIRONMENT_ENTRY_BYTES,
        )?,
        user: text("user", said.user)?,
        working_dir: text("working folder", said.working_dir)?,
    })
}
