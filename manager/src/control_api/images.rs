//! Images: a name for content, fixed once. A tag that could move would make two replicas of one service differ.

use bulkhead_proto::wire::{CreateImageRequest, Image, RemoveRequest};
use bulkhead_proto::{Code, Digest};
use bulkhead_raft::state::State;
use tonic::Status;

use super::change::{Decision, Plan, in_use, new_id, users};
use super::check;
use super::object::{IMAGES, Kept, get, label};
use crate::refusal::refuse;
use crate::registry::{self, Described, ImageError, NoMajority};

/// The image that is called so, with or without its tag, or the one of this id.
pub(super) fn find<'a>(state: &'a State, selector: &str) -> Result<&'a Image, Status> {
    let tagged = check::image_name(selector).ok();
    let named = tagged.and_then(|name| Image::of(state.by_name(Image::KIND, &name)?));
    named.map_or_else(|| IMAGES.find(state, selector), Ok)
}

/// What stands already under the request's name or id, if the request asks for the same.
pub(super) fn standing(state: &State, request: &CreateImageRequest) -> Result<Option<Decision>, Status> {
    let id = new_id(&request.image_id)?;
    let name = check::image_name(&request.name)?;
    if let Some(made) = get::<Image>(state, &id).filter(|it| it.was_made_by(&request.request_id)) {
        return Ok(Some(Decision::done(made)));
    }
    let Some(taken) = state.by_name(Image::KIND, &name).and_then(|it| Image::of(it)) else {
        return Ok(None);
    };
    if taken.manifest_digest == request.manifest_digest {
        return Ok(Some(Decision::done(taken)));
    }
    let digest = registry::digest(&taken.manifest_digest)?;
    Err(refuse(
        Code::NameTaken,
        tonic::Code::AlreadyExists,
        format!("image '{name}' exists with other content, {digest}"),
        format!("give the new content another tag, or remove the old with `bulkhead image rm {name}`"),
    ))
}

/// The image whose content was checked and copied.
pub(super) fn create(request: &CreateImageRequest, described: Described) -> Result<Plan, Status> {
    let id = new_id(&request.image_id)?;
    let (config, config_size) = described.config;
    Ok(Plan::about(&id).create(Image {
        id: id.to_vec(),
        name: check::image_name(&request.name)?,
        manifest_digest: request.manifest_digest.clone(),
        manifest_size: request.manifest_size,
        config_digest: config.as_bytes().to_vec(),
        config_size,
        layers: described.layers,
        size: described.size,
        config: Some(described.run),
        ..Default::default()
    }))
}

/// Removes an image that no service uses. Its blobs go later.
pub(super) fn remove(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let image = find(state, &request.selector)?;
    match users(state, Some(&image.reference())) {
        users if users.is_empty() => Ok(Plan::about(&image.id).delete(image).into()),
        users => Err(in_use(&format!("image {}", label(image)), &users)),
    }
}

/// Why an image is not taken, for its sender.
pub(super) fn refused(manifest: Digest, error: &ImageError) -> Status {
    let why = format!("image {manifest}: {error}");
    match error {
        ImageError::Blob(error) => registry::status(error),
        ImageError::TooLarge { .. } => check::over("image", &why),
        ImageError::Size { .. } => refuse(
            Code::DamagedBlob,
            tonic::Code::InvalidArgument,
            why,
            "build the image again, and push it whole",
        ),
        ImageError::Malformed { .. } | ImageError::Unsupported(_) => refuse(
            Code::UnsupportedImage,
            tonic::Code::InvalidArgument,
            why,
            "make it an OCI image for linux: `skopeo copy … oci:FOLDER:NAME` converts",
        ),
    }
}

/// Too few managers took the image.
pub(super) fn not_copied(error: &NoMajority) -> Status {
    refuse(
        Code::NoQuorum,
        tonic::Code::Unavailable,
        error.to_string(),
        "bring more managers up, then send the request again; what was copied stays",
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::{applied, image, refused as is_refused, service, state};
    use super::*;

    fn request(name: &str, digest: u8) -> CreateImageRequest {
        CreateImageRequest {
            request_id: vec![5; 16],
            image_id: vec![9; 16],
            name: name.into(),
            manifest_digest: vec![digest; 32],
            manifest_size: 3,
        }
    }

    #[test]
    fn a_name_is_fixed_to_its_first_content() {
        let state = state([image(1, "web:1")]);
        assert!(standing(&state, &request("web:2", 1)).expect("free").is_none());
        assert!(
            standing(&state, &request("web", 1)).expect("free").is_none(),
            "latest is another tag"
        );
        let same = standing(&state, &request("web:1", 1)).expect("the same again");
        assert!(matches!(same, Some(Decision::Done { id, .. }) if id == [1; 16]));
        let status = standing(&state, &request("web:1", 2)).expect_err("other content");
        is_refused(&status, Code::NameTaken, "other content", "image rm web:1");
    }

    #[test]
    fn an_image_is_found_without_its_latest_tag() {
        let state = state([image(1, "web:latest"), image(2, "db:1")]);
        assert_eq!(find(&state, "web").expect("latest").id, [1; 16]);
        assert_eq!(find(&state, "db:1").expect("tagged").id, [2; 16]);
        assert!(find(&state, "db").is_err());
    }

    #[test]
    fn an_image_in_use_stays_and_its_users_are_named() {
        let mut state = state([
            image(1, "web:1"),
            service(2, "shop", 1, |spec| spec.image_id = vec![1; 16]),
        ]);
        let mut request = RemoveRequest {
            selector: "web:1".into(),
            ..Default::default()
        };
        let status = remove(&state, &request).expect_err("in use");
        is_refused(&status, Code::InUse, "service shop", "");
        let other = image(3, "old:1");
        applied(
            &mut state,
            &[1; 16],
            Plan::default().create(Image::of(&other).expect("an image").clone()),
        );
        request.selector = "old:1".into();
        assert!(remove(&state, &request).is_ok());
    }
}
