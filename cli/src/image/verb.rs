//! `image`: what the cluster's own store holds, and how it gets there.

use std::path::{Path, PathBuf};

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    BlobHeader, CreateImageRequest, Image, ListRequest, PushBlobRequest, push_blob_request,
};
use bytes::BytesMut;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Layout, Manifest, PackOptions, VerifiedBlob, pack};
use crate::app::App;
use crate::command::{image_name, numeric_user, variable};
use crate::connection::{Connection, Effect, Patience, one, pages, removal};
use crate::output::{Filters, Format, Listing, Progress, Row, document, text};
use crate::refusal::{Code, Exit, Refusal};

/// Bytes of a program to be packed; it is held in memory.
const PROGRAM_BYTES: u64 = 512 << 20;
/// Times that an image's blobs are sent, if the manager that took them cannot be reached when the image is made of them.
const PUSHES: usize = 5;

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageVerb {
    /// Makes an OCI image of one static program and stores it
    Pack(Pack),
    /// Stores an image that any tool made, an OCI layout folder or tar
    #[command(visible_alias = "push")]
    Load {
        /// The layout
        path: PathBuf,
        /// The image's name [default: its name inside the layout]
        #[arg(short, long, value_parser = image_name)]
        tag: Option<String>,
    },
    /// Checks an OCI layout, folder or tar, without a cluster
    Check {
        /// The layout
        path: PathBuf,
        /// The image's name inside the layout
        #[arg(short, long)]
        tag: Option<String>,
    },
    /// Lists the stored images
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Shows images whole
    Inspect {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Removes images that no service uses
    #[command(visible_alias = "remove")]
    Rm {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

/// Flags of `image pack`.
#[derive(Debug, Args)]
pub(crate) struct Pack {
    /// The static program
    program: PathBuf,
    /// Name of the image, like web:1
    #[arg(short, long, value_parser = image_name)]
    tag: String,
    /// Writes a tar instead of storing the image; it must not exist
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Entry point instead of the program; once for each word
    #[arg(long, allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// NAME=value in every task of the image
    #[arg(short, long, value_parser = variable)]
    env: Vec<String>,
    /// uid[:gid] that it runs as; not root unless said
    #[arg(short, long, value_parser = numeric_user)]
    user: Option<String>,
}

pub(crate) async fn run(verb: ImageVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        ImageVerb::Pack(options) => self::pack_and_store(&options, app).await?,
        ImageVerb::Load { path, tag } => load(&path, tag.as_deref(), app).await?,
        ImageVerb::Check { path, tag } => {
            let image = Layout::open(&path)?.verify(tag.as_deref())?;
            app.print(&describe(&image, app.global.format.unwrap_or(Format::Table)))?;
        }
        ImageVerb::Ls { filters } => ls(app, &filters).await?,
        ImageVerb::Inspect { images } => {
            let mut connection = app.connect()?;
            let mut found = Vec::new();
            for selector in images {
                found.push(json(&one!(connection, "image", list_images, images, &selector)?));
            }
            app.inspect(&found)?;
        }
        ImageVerb::Rm { images } => {
            let mut connection = app.connect()?;
            for selector in images {
                let place = format!("image {selector}");
                let image: Image = one!(connection, "image", list_images, images, &selector)?;
                let request = removal(&image.id);
                let answer = connection
                    .change(&place, async |mut c| c.remove_image(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
            }
        }
    }
    Ok(Exit::Done)
}

async fn pack_and_store(options: &Pack, app: &mut App<'_>) -> Result<(), Refusal> {
    let program = read_bounded(&options.program, PROGRAM_BYTES)?;
    let name = options.program.file_name().unwrap_or_default();
    let packed = pack(
        &program,
        &PackOptions {
            program_name: name.to_string_lossy().into_owned(),
            reference: Some(options.tag.clone()),
            entrypoint: options.entrypoint.clone(),
            environment: options.env.clone(),
            user: options.user.clone(),
        },
    )?;
    if let Some(path) = &options.output {
        write_new(path, &packed.archive)?;
        return app.print(&format!("{}\n", packed.manifest));
    }
    let refuse = |e: std::io::Error| {
        Refusal::new(
            Code::Unwritable,
            "temporary file",
            e.to_string(),
            "make room in $TMPDIR",
        )
    };
    let mut file = tempfile::NamedTempFile::new().map_err(refuse)?;
    std::io::Write::write_all(&mut file, &packed.archive).map_err(refuse)?;
    load(file.path(), Some(&options.tag), app).await
}

async fn load(path: &Path, tag: Option<&str>, app: &mut App<'_>) -> Result<(), Refusal> {
    let layout = Layout::open(path)?;
    let image = match layout.verify(tag) {
        // A layout with one image may be given any name.
        Err(refusal) if tag.is_some() && refusal.code() == Code::AmbiguousImage => {
            layout.verify(None).map_err(|_| refusal)?
        }
        found => found?,
    };
    let name = match (tag, image.reference.as_deref()) {
        (Some(tag), _) => tag.to_owned(),
        (None, Some(reference)) => image_name(reference).map_err(|reason| {
            Refusal::new(
                Code::BadField,
                format!("name '{reference}'"),
                reason,
                "name it with -t",
            )
        })?,
        (None, None) => {
            let place = path.display().to_string();
            return Err(Refusal::new(
                Code::AmbiguousImage,
                place,
                "it names no image",
                "name it with -t",
            ));
        }
    };
    let mut connection = app.connect()?;
    let mut progress = app.progress();
    let place = format!("image {name}");
    let request = CreateImageRequest {
        request_id: text::new_id().to_vec(),
        image_id: text::new_id().to_vec(),
        name,
        manifest_digest: image.manifest.digest.as_bytes().to_vec(),
        manifest_size: image.manifest.size,
    };
    let mut pushes = 0;
    let answer = loop {
        for blob in image.layers.iter().chain([&image.config, &image.manifest]) {
            push(&mut connection, &layout, blob, &mut progress).await?;
        }
        pushes += 1;
        // Acknowledged once a majority of managers holds every blob.
        let answer = connection
            .call(Effect::Change, Patience::for_blobs(), &place, async |mut c| {
                c.create_image(request.clone()).await
            })
            .await;
        match answer {
            // The manager that took the blobs is out of the others' reach: they are sent to the one that answers now.
            Err(refusal) if refusal.code() == Code::NotFound && pushes < PUSHES => {}
            answer => break answer?,
        }
    };
    drop(progress);
    app.print(&format!("{}\n", text::id(&answer.id)))
}

/// Sends a blob, unless the managers have it.
async fn push(
    connection: &mut Connection,
    layout: &Layout,
    blob: &VerifiedBlob,
    progress: &mut Progress<'_>,
) -> Result<(), Refusal> {
    let short: String = blob.digest.hex().chars().take(12).collect();
    let size = text::bytes(blob.size);
    progress.set(&short, &format!("sending {size}"));
    let place = format!("blob {}", blob.digest);
    let answer = connection
        .call(
            Effect::Change,
            Patience::for_blobs(),
            &place,
            async |mut control| {
                let header = PushBlobRequest {
                    message: Some(push_blob_request::Message::Header(BlobHeader {
                        digest: blob.digest.as_bytes().to_vec(),
                        size: blob.size,
                    })),
                };
                let content = layout
                    .blob(blob)
                    .map_err(|refusal| tonic::Status::failed_precondition(refusal.one_line()))?;
                // A file that cannot be read on ends the stream early, and the manager sees a blob that is too short.
                let data = chunks(content).map(|data| PushBlobRequest {
                    message: Some(push_blob_request::Message::Data(data)),
                });
                let messages = std::iter::once(header).chain(data);
                control.push_blob(tokio_stream::iter(messages)).await
            },
        )
        .await?;
    progress.set(
        &short,
        &format!("{size}{}", if answer.existed { ", was there" } else { "" }),
    );
    Ok(())
}

/// The content of a reader in pieces that fit a message.
fn chunks(mut from: impl std::io::Read) -> impl Iterator<Item = Vec<u8>> {
    std::iter::from_fn(move || {
        let mut chunk = BytesMut::zeroed(limits::CHUNK_BYTES);
        let mut filled = 0;
        while filled < chunk.len() {
            match from.read(&mut chunk[filled..]) {
                Ok(0) | Err(_) => break,
                Ok(got) => filled += got,
            }
        }
        chunk.truncate(filled);
        (filled > 0).then(|| chunk.to_vec())
    })
}

async fn ls(app: &mut App<'_>, filters: &Filters) -> Result<(), Refusal> {
    let mut connection = app.connect()?;
    let images = pages!(connection, "images", list_images, ListRequest::default(), images);
    let now = text::now_ms();
    let row = |image: &Image| {
        let id = text::id(&image.id);
        let created = image.meta.as_ref().map_or(0, |m| m.created_at);
        let digest = format!("sha256:{}", crate::node::hex(&image.manifest_digest));
        let shown = if app.global.no_trunc {
            digest.as_str()
        } else {
            &digest[..19.min(digest.len())]
        };
        Row {
            cells: vec![
                app.id_cell(&id),
                image.name.clone(),
                shown.to_owned(),
                text::bytes(image.size),
                text::distance(created, now),
            ],
            id,
            json: json(image),
        }
    };
    let listing = Listing {
        headers: &["ID", "NAME", "DIGEST", "SIZE", "CREATED"],
        keys: &["id", "name", "digest"],
        rows: images.iter().map(row).collect(),
    };
    app.list(listing, filters)
}

fn json(image: &Image) -> Value {
    let digest = |bytes: &[u8]| format!("sha256:{}", crate::node::hex(bytes));
    let config = image.config.clone().unwrap_or_default();
    json!({
        "id": text::id(&image.id),
        "name": image.name,
        "digest": digest(&image.manifest_digest),
        "config_digest": digest(&image.config_digest),
        "size": image.size,
        "layers": image.layers.iter().map(|layer| json!({
            "digest": digest(&layer.digest), "size": layer.size, "media_type": layer.media_type,
        })).collect::<Vec<_>>(),
        "config": {
            "entrypoint": config.entrypoint, "command": config.command, "environment": config.environment,
            "user": config.user, "working_dir": config.working_dir,
        },
        "created_at": text::time(image.meta.as_ref().map_or(0, |m| m.created_at)),
    })
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, Refusal> {
    use std::io::Read;
    let place = path.display().to_string();
    let unreadable =
        |e: std::io::Error| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path");
    let mut content = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(limit + 1)
        .read_to_end(&mut content)
        .map_err(unreadable)?;
    if content.len() as u64 > limit {
        let reason = format!("it is over {limit} bytes");
        return Err(Refusal::new(Code::OverLimit, &place, reason, "strip the program"));
    }
    Ok(content)
}

/// Writes a file whole or not at all, and over nothing: the name appears once the content is on disk.
fn write_new(path: &Path, content: &[u8]) -> Result<(), Refusal> {
    let place = path.display().to_string();
    let refuse = |e: std::io::Error| {
        Refusal::new(
            Code::Unwritable,
            &place,
            e.to_string(),
            "choose a new name in a writable folder",
        )
    };
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(refuse)?;
    std::io::Write::write_all(&mut file, content)
        .and_then(|()| file.as_file().sync_all())
        .map_err(refuse)?;
    file.persist_noclobber(path).map_err(|e| refuse(e.error))?;
    Ok(())
}

fn describe(image: &Manifest, format: Format) -> String {
    let bytes: u64 = image.layers.iter().map(|layer| layer.size).sum();
    let name = image.reference.as_deref();
    match format {
        Format::Table => {
            let mut rows = format!(
                "name      {}\nmanifest  {}\nconfig    {}\n",
                name.unwrap_or("-").escape_debug(),
                image.manifest.digest,
                image.config.digest
            );
            for layer in &image.layers {
                rows.push_str(&format!("layer     {}  {} bytes\n", layer.digest, layer.size));
            }
            rows
        }
        Format::Json | Format::Jsonl => {
            let layers: Vec<_> = image
                .layers
                .iter()
                .map(|l| serde_json::json!({ "digest": l.digest.to_string(), "size": l.size }))
                .collect();
            document(
                &serde_json::json!({
                    "name": name,
                    "manifest": image.manifest.digest.to_string(),
                    "config": image.config.digest.to_string(),
                    "layers": layers,
                    "layer_bytes": bytes,
                }),
                format,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_exists_is_not_written_over() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x.tar");
        write_new(&path, b"one").expect("a new file");
        assert_eq!(
            write_new(&path, b"two").map_err(|e| e.code()),
            Err(Code::Unwritable)
        );
        assert_eq!(std::fs::read(&path).expect("it is there"), b"one");
    }

    #[test]
    fn a_blob_is_cut_into_messages_and_loses_nothing() {
        let content: Vec<u8> = (0..limits::CHUNK_BYTES * 2 + 5)
            .map(|at| u8::try_from(at % 251).expect("below 251"))
            .collect();
        let pieces: Vec<Vec<u8>> = chunks(content.as_slice()).collect();
        assert_eq!(
            pieces.iter().map(Vec::len).collect::<Vec<_>>(),
            [limits::CHUNK_BYTES, limits::CHUNK_BYTES, 5]
        );
        assert_eq!(pieces.concat(), content);
        assert_eq!(chunks(&[][..]).count(), 0);
    }
}
