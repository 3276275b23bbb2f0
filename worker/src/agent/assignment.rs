//! What a manager assigns, checked: everything behind these types has ids of the right length, known states and
//! bounded lists.

use bulkhead_launcher::message::{Compression, DiffId};
use bulkhead_proto::{Digest, ImageId, SecretId, ServiceId, TaskId, limits, wire};
use std::time::Duration;

/// What is wanted of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Desired {
    /// Fetched and unpacked, not started.
    Ready,
    /// Started, once.
    Running,
    /// Stopped; its record and logs stay.
    Shutdown,
    /// Stopped and forgotten.
    Remove,
}

/// A task that is this node's.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// Which task.
    pub task: TaskId,
    /// Whose task.
    pub service: ServiceId,
    /// The service's name, for the task's host name and for messages.
    pub service_name: String,
    /// Which replica.
    pub slot: u32,
    /// The fencing epoch of its start.
    pub fence: u64,
    /// What is wanted.
    pub desired: Desired,
    /// Not to be started before, in milliseconds since 1970.
    pub start_after_ms: i64,
    /// The image it is made of.
    pub image: ImageId,
    /// The secrets it gets, with the names of their files.
    pub secrets: Vec<(SecretId, String)>,
    /// Published ports: on the host, and inside the task.
    pub ports: Vec<(u16, u16)>,
    /// From SIGTERM to SIGKILL.
    pub stop_grace: Duration,
    /// What else the user asked for; read once, by [`super::start::task_spec`].
    pub spec: wire::ServiceSpec,
}

/// An image as the managers describe it.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Which image.
    pub id: ImageId,
    /// Its name, for messages.
    pub name: String,
    /// Base first.
    pub layers: Vec<Layer>,
    /// Defaults for its tasks.
    pub config: wire::ImageConfig,
}

/// A layer: the blob that carries it and the archive inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layer {
    /// The blob, as it travels.
    pub blob: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// How it is compressed.
    pub packing: Packing,
    /// The digest of the archive inside.
    pub diff: Digest,
}

impl Layer {
    /// The layer's name at the launcher.
    pub fn diff_id(&self) -> DiffId {
        diff_id(self.diff)
    }
}

/// A layer's name at the launcher.
pub(super) fn diff_id(diff: Digest) -> DiffId {
    DiffId::try_from(diff.to_string()).expect("a digest's text is sha256: and 64 lower-case hex digits")
}

/// How a layer's blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

impl Packing {
    /// From the layer's media type (image specification, "layer.md").
    fn from_media_type(media_type: &str) -> Result<Self, Malformed> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar" => Ok(Packing::Plain),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Packing::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd" => Ok(Packing::Zstd),
            other => Err(Malformed(format!(
                "a layer has the media type '{}', which is none of tar, tar+gzip and tar+zstd",
                other.chars().take(100).collect::<String>()
            ))),
        }
    }

    /// The launcher's word for it.
    pub fn compression(self) -> Compression {
        match self {
            Packing::Plain => Compression::None,
            Packing::Gzip => Compression::Gzip,
            Packing::Zstd => Compression::Zstd,
        }
    }
}

/// An assignment that no correct manager sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed assignment: {0}")]
pub struct Malformed(pub String);

impl From<bulkhead_proto::ids::ParseIdError> for Malformed {
    fn from(error: bulkhead_proto::ids::ParseIdError) -> Self {
        Malformed(error.to_string())
    }
}

impl TryFrom<wire::AssignedTask> for Assignment {
    type Error = Malformed;

    fn try_from(assigned: wire::AssignedTask) -> Result<Self, Malformed> {
        let task = assigned.task.ok_or_else(|| missing("task"))?;
        let spec = assigned.spec.ok_or_else(|| missing("spec"))?;
        let lists = [spec.secrets.len(), spec.ports.len(), spec.tmpfs.len()];
        if lists.into_iter().any(|length| length > limits::SPEC_LIST_ENTRIES) {
            return Err(Malformed("a list of the service is over its limit".into()));
        }
        let secret = |secret: &wire::SecretReference| Ok((id(&secret.secret_id)?, secret.name.clone()));
        Ok(Assignment {
            task: id(&task.id)?,
            service: id(&task.service_id)?,
            service_name: assigned.service_name,
            slot: task.slot,
            fence: task.fence,
            desired: desired(task.desired)?,
            start_after_ms: task.start_after,
            image: id(&spec.image_id)?,
            secrets: spec
                .secrets
                .iter()
                .map(secret)
                .collect::<Result<_, Malformed>>()?,
            ports: spec.ports.iter().map(ports).collect::<Result<_, Malformed>>()?,
            stop_grace: match spec.stop_grace_ms {
                0 => limits::STOP_GRACE,
                ms => Duration::from_millis(ms),
            },
            spec,
        })
    }
}

impl TryFrom<wire::Image> for Image {
    type Error = Malformed;

    fn try_from(image: wire::Image) -> Result<Self, Malformed> {
        if image.layers.is_empty() || image.layers.len() > limits::IMAGE_LAYERS {
            return Err(Malformed(format!(
                "the image '{}' has {} layers; 1 to {} are possible",
                image.name,
                image.layers.len(),
                limits::IMAGE_LAYERS
            )));
        }
        Ok(Image {
            id: id(&image.id)?,
            name: image.name,
            layers: image.layers.iter().map(layer).collect::<Result<_, _>>()?,
            config: image.config.unwrap_or_default(),
        })
    }
}

fn layer(layer: &wire::ImageLayer) -> Result<Layer, Malformed> {
    if layer.size > limits::BLOB_BYTES {
        return Err(Malformed(format!(
            "a layer has {} bytes; {} are the most",
            layer.size,
            limits::BLOB_BYTES
        )));
    }
    Ok(Layer {
        blob: digest(&layer.digest)?,
        size: layer.size,
        packing: Packing::from_media_type(&layer.media_type)?,
        diff: digest(&layer.diff_id)?,
    })
}

fn desired(number: i32) -> Result<Desired, Malformed> {
    match wire::DesiredState::try_from(number) {
        Ok(wire::DesiredState::Ready) => Ok(Desired::Ready),
        Ok(wire::DesiredState::Running) => Ok(Desired::Running),
        Ok(wire::DesiredState::Shutdown) => Ok(Desired::Shutdown),
        Ok(wire::DesiredState::Remove) => Ok(Desired::Remove),
        Ok(wire::DesiredState::Unspecified) | Err(_) => Err(Malformed(format!("desired state {number}"))),
    }
}

fn ports(port: &wire::PublishedPort) -> Result<(u16, u16), Malformed> {
    let number = |number: u32| match u16::try_from(number) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Malformed(format!("port {number}"))),
    };
    Ok((number(port.host)?, number(port.target)?))
}

fn digest(bytes: &[u8]) -> Result<Digest, Malformed> {
    let bytes = bytes
        .try_into()
        .map_err(|_| Malformed("a digest that is not SHA-256".into()))?;
    Ok(Digest::from_bytes(bytes))
}

pub(super) fn id<'a, T>(bytes: &'a [u8]) -> Result<T, Malformed>
where
    T: TryFrom<&'a [u8], Error = bulkhead_proto::ids::ParseIdError>,
{
    Ok(T::try_from(bytes)?)
}

fn missing(field: &str) -> Malformed {
    Malformed(format!("no {field}"))
}
