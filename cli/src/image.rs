//! OCI images as files: made from one static program, read from a layout of any tool.

mod elf;
mod pack;
mod read;
mod verb;

pub use pack::{PackOptions, Packed, pack};
pub use read::{Layout, Manifest, VerifiedBlob};
pub(crate) use verb::ImageVerb;
pub(crate) use verb::run;

/// Media types of the image specification 1.1 that this program reads and writes.
mod media {
    pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub(super) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub(super) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    pub(super) const LAYERS: [&str; 3] = [
        LAYER,
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
    ];
    /// The annotation that names an image inside a layout (image-spec, annotations.md).
    pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
}
