//! How requests name objects, and how long lists are cut into pages.

use bulkhead_proto::ids::base32_lower;
use bulkhead_proto::wire::{
    self, Cluster, Image, Kind, ListRequest, Meta, Node, Object, Role, Secret, Service, Task, Ticket,
    object::Object as Any,
};
use bulkhead_proto::{Code, limits};
use bulkhead_raft::state::{Key, State};
use tonic::Status;

use crate::refusal::refuse;

/// Candidates that a refusal lists.
const CANDIDATES: usize = 5;
/// Bytes of one page: half of a message, so that one large object more still fits.
const PAGE_BYTES: usize = limits::MESSAGE_BYTES / 2;
/// Characters of a selector: the longest name is an image's.
const SELECTOR_CHARS: usize = limits::IMAGE_REFERENCE_CHARS;

/// What all kinds of objects have in common.
pub(super) trait Kept: Clone + prost::Message + 'static {
    const KIND: Kind;
    fn of(object: &Object) -> Option<&Self>;
    /// The object for a command: without metadata, which only `apply` writes.
    fn object(self) -> Object;
    fn id(&self) -> &[u8];
    fn meta(&self) -> Option<&Meta>;
    /// Empty where the kind has no names.
    fn name(&self) -> &str;

    fn reference(&self) -> wire::ObjectRef {
        wire::ObjectRef {
            kind: Self::KIND.into(),
            id: self.id().to_vec(),
        }
    }

    fn version(&self) -> u64 {
        self.meta().map_or(0, |meta| meta.version)
    }

    /// Whether this request made the object what it is: then it is a retry, and done.
    fn was_made_by(&self, request: &[u8]) -> bool {
        self.meta().is_some_and(|meta| meta.last_request == request)
    }
}

macro_rules! kept {
    ($($kind:ident: $name:expr;)*) => {$(
        impl Kept for $kind {
            const KIND: Kind = Kind::$kind;
            fn of(object: &Object) -> Option<&Self> {
                match &object.object {
                    Some(Any::$kind(it)) => Some(it),
                    _ => None,
                }
            }
            fn object(mut self) -> Object {
                self.meta = None;
                Object { object: Some(Any::$kind(self)) }
            }
            fn id(&self) -> &[u8] {
                &self.id
            }
            fn meta(&self) -> Option<&Meta> {
                self.meta.as_ref()
            }
            fn name(&self) -> &str {
                let name: fn(&$kind) -> &str = $name;
                name(self)
            }
        }
    )*};
}

kept! {
    Cluster: |_| "";
    Node: |it| &it.name;
    Ticket: |_| "";
    Secret: |it| &it.name;
    Image: |it| &it.name;
    Service: |it| newest(it).map_or("", |spec| &spec.name);
    Task: |_| "";
}

/// The spec that a service should have now.
pub(super) fn newest(service: &Service) -> Option<&wire::ServiceSpec> {
    service.versions.last()?.spec.as_ref()
}

/// An id as text.
pub(super) fn id_text(id: &[u8]) -> String {
    base32_lower().encode(id)
}

/// The object of this kind and id.
pub(super) fn get<'a, T: Kept>(state: &'a State, id: &[u8]) -> Option<&'a T> {
    let key = Key::new(T::KIND, id.try_into().ok()?);
    T::of(state.get(key)?)
}

/// Objects as an operator knows them: nodes and operators are one kind of object and two of these.
pub(super) struct Category<T> {
    noun: &'static str,
    listing: &'static str,
    holds: fn(&T) -> bool,
}

pub(super) const NODES: Category<Node> = Category {
    noun: "node",
    listing: "bulkhead node ls",
    holds: |node| node.role() != Role::Operator,
};
pub(super) const OPERATORS: Category<Node> = Category {
    noun: "operator",
    listing: "bulkhead operator ls",
    holds: |node| node.role() == Role::Operator,
};
pub(super) const TICKETS: Category<Ticket> = Category {
    noun: "ticket",
    listing: "bulkhead cluster ticket ls",
    holds: |_| true,
};
pub(super) const SECRETS: Category<Secret> = Category {
    noun: "secret",
    listing: "bulkhead secret ls",
    holds: |_| true,
};
pub(super) const IMAGES: Category<Image> = Category {
    noun: "image",
    listing: "bulkhead image ls",
    holds: |_| true,
};
pub(super) const SERVICES: Category<Service> = Category {
    noun: "service",
    listing: "bulkhead service ls",
    holds: |_| true,
};
pub(super) const TASKS: Category<Task> = Category {
    noun: "task",
    listing: "bulkhead task ls",
    holds: |_| true,
};

impl<T: Kept> Category<T> {
    /// All of them, by id.
    pub(super) fn all<'a>(&self, state: &'a State) -> impl Iterator<Item = &'a T> + use<'a, T> {
        let holds = self.holds;
        state
            .list(T::KIND)
            .filter_map(|object| T::of(object))
            .filter(move |it| holds(it))
    }

    /// The one that is meant: by its exact name, its full id in base32 or hex, or the start of its id.
    pub(super) fn find<'a>(&self, state: &'a State, selector: &str) -> Result<&'a T, Status> {
        let noun = self.noun;
        if selector.is_empty() || selector.len() > SELECTOR_CHARS {
            return Err(refuse(
                Code::Invalid,
                tonic::Code::InvalidArgument,
                format!("a {noun} is named by 1 to {SELECTOR_CHARS} characters"),
                format!("give the name or id that `{}` shows", self.listing),
            ));
        }
        let named = state.by_name(T::KIND, selector).and_then(|object| T::of(object));
        if let Some(found) = named.filter(|it| (self.holds)(it)) {
            return Ok(found);
        }
        let hex = data_encoding::HEXLOWER_PERMISSIVE.decode(selector.as_bytes());
        let full = hex.ok().and_then(|id| get::<T>(state, &id));
        if let Some(found) = full.filter(|it| (self.holds)(it)) {
            return Ok(found);
        }
        let found: Vec<&T> = self
            .all(state)
            .filter(|it| id_text(it.id()).starts_with(selector))
            .collect();
        match found[..] {
            [found] => Ok(found),
            [] => Err(self.not_found(state, selector)),
            [..] => Err(self.ambiguous(selector, &found)),
        }
    }

    fn not_found(&self, state: &State, selector: &str) -> Status {
        let mut near: Vec<&str> = self
            .all(state)
            .map(Kept::name)
            .filter(|name| !name.is_empty() && is_near(name, selector))
            .take(CANDIDATES)
            .collect();
        near.sort_unstable();
        let hint = match near[..] {
            [] => format!("`{}` lists what there is", self.listing),
            _ => format!(
                "did you mean {}? `{}` lists what there is",
                near.join(", "),
                self.listing
            ),
        };
        let message = format!("there is no {} '{selector}'", self.noun);
        refuse(Code::NotFound, tonic::Code::NotFound, message, hint)
    }

    fn ambiguous(&self, selector: &str, found: &[&T]) -> Status {
        let mut shown: Vec<String> = found.iter().take(CANDIDATES).map(|it| label(*it)).collect();
        if found.len() > CANDIDATES {
            shown.push("…".into());
        }
        let (count, noun) = (found.len(), self.noun);
        refuse(
            Code::Ambiguous,
            tonic::Code::FailedPrecondition,
            format!(
                "the ids of {count} {noun}s start with '{selector}': {}",
                shown.join(", ")
            ),
            "give more of the id, or the name",
        )
    }

    /// One page of the list that a request asks for, as `show` makes it, and the id to ask for the next one after.
    pub(super) fn page<M: prost::Message>(
        &self,
        state: &State,
        request: &ListRequest,
        show: impl Fn(&T) -> M,
    ) -> Result<(Vec<M>, Vec<u8>), Status> {
        if !request.selector.is_empty() {
            return Ok((vec![show(self.find(state, &request.selector)?)], Vec::new()));
        }
        Ok(page(self.all(state), &request.after, show))
    }
}

/// The objects after an id, as many as fit one answer. Objects come by id.
pub(super) fn page<'a, T: Kept, M: prost::Message>(
    objects: impl Iterator<Item = &'a T>,
    after: &[u8],
    show: impl Fn(&T) -> M,
) -> (Vec<M>, Vec<u8>) {
    let mut shown = Vec::new();
    let (mut bytes, mut last) = (0, Vec::new());
    for object in objects.filter(|it| it.id() > after) {
        let message = show(object);
        bytes += message.encoded_len();
        if !shown.is_empty() && (shown.len() >= limits::LIST_ENTRIES || bytes > PAGE_BYTES) {
            return (shown, last);
        }
        last = object.id().to_vec();
        shown.push(message);
    }
    (shown, Vec::new())
}

/// An object as a refusal names it.
pub(super) fn label<T: Kept>(it: &T) -> String {
    let id = id_text(it.id());
    let short = id.get(..12).unwrap_or(&id);
    match it.name() {
        "" => short.to_owned(),
        name => format!("{name} ({short})"),
    }
}

/// Whether someone who typed one may have meant the other: one holds the other, or they are at most two edits apart.
fn is_near(name: &str, typed: &str) -> bool {
    const EDITS: usize = 2;
    if typed.len() >= 3 && (name.contains(typed) || typed.contains(name)) {
        return true;
    }
    let (name, typed): (Vec<char>, Vec<char>) = (name.chars().collect(), typed.chars().collect());
    if name.len().abs_diff(typed.len()) > EDITS || typed.len() <= EDITS || typed.len() > limits::NAME_CHARS {
        return false;
    }
    let mut row: Vec<usize> = (0..=typed.len()).collect();
    for (n, from) in name.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = n + 1;
        for (t, to) in typed.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[t + 1];
            row[t + 1] = replaced.min(row[t] + 1).min(row[t + 1] + 1);
        }
    }
    row[typed.len()] <= EDITS
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::NodeId;

    use super::super::testing::{node, refused, secret, state};
    use super::*;

    #[test]
    fn an_object_is_found_by_name_id_and_prefix() {
        let state = state([
            node(0xAA, "one", Role::Worker),
            node(0xAB, "two", Role::Manager),
            node(7, "ops", Role::Operator),
        ]);
        let base32 = NodeId::from_bytes([0xAA; 16]).to_string();
        let hex = "aa".repeat(16);
        for selector in ["one", &base32, &hex, &hex.to_uppercase(), &base32[..3]] {
            assert_eq!(
                NODES.find(&state, selector).expect(selector).name,
                "one",
                "{selector}"
            );
        }
        assert_eq!(OPERATORS.find(&state, "ops").expect("an operator").name, "ops");
    }

    #[test]
    fn what_is_not_one_object_is_refused_with_candidates() {
        let state = state([
            node(0xAA, "worker-1", Role::Worker),
            node(0xAB, "worker-2", Role::Worker),
            node(7, "ops", Role::Operator),
        ]);
        let check = |selector: &str, code, message: &str, hint: &str| {
            let status = NODES.find(&state, selector).expect_err(selector);
            refused(&status, code, message, hint);
        };
        check("", Code::Invalid, "a node is named by", "bulkhead node ls");
        check(
            &"x".repeat(300),
            Code::Invalid,
            "a node is named by",
            "bulkhead node ls",
        );
        check(
            "worker-3",
            Code::NotFound,
            "there is no node 'worker-3'",
            "did you mean worker-1, worker-2?",
        );
        check(
            "zzzzzz",
            Code::NotFound,
            "there is no node 'zzzzzz'",
            "`bulkhead node ls` lists",
        );
        check(
            "ops",
            Code::NotFound,
            "there is no node 'ops'",
            "`bulkhead node ls` lists",
        );
        let prefix = &NodeId::from_bytes([0xAA; 16]).to_string()[..1];
        check(
            prefix,
            Code::Ambiguous,
            "the ids of 2 nodes start with",
            "give more of the id",
        );
        let ambiguous = NODES.find(&state, prefix).expect_err("two");
        assert!(ambiguous.message().contains("worker-1") && ambiguous.message().contains("worker-2"));
    }

    #[test]
    fn a_name_wins_over_the_start_of_an_id() {
        let name = &NodeId::from_bytes([0xAA; 16]).to_string()[..5];
        let state = state([node(0xAA, "other", Role::Worker), node(1, name, Role::Worker)]);
        assert_eq!(NODES.find(&state, name).expect("by name").id, [1; 16]);
    }

    #[test]
    fn a_page_ends_before_the_message_is_too_large_and_the_next_goes_on() {
        let large: Vec<Secret> = (1..=9)
            .map(|n| Secret {
                id: vec![n; 16],
                name: "x".repeat(PAGE_BYTES / 2 - 100),
                ..Default::default()
            })
            .collect();
        let (shown, next) = page(large.iter(), &[], Clone::clone);
        assert_eq!((shown.len(), next), (2, vec![2; 16]));
        let (shown, next) = page(large.iter(), &[7; 16], Clone::clone);
        assert_eq!((shown.len(), next), (2, vec![]));
    }

    #[test]
    fn a_list_shows_all_or_the_one_selected() {
        let state = state((1..=9).map(|n| secret(n, &format!("s{n}"))));
        let ask = |selector: &str| ListRequest {
            selector: selector.into(),
            after: Vec::new(),
        };
        let (all, next) = SECRETS.page(&state, &ask(""), Clone::clone).expect("all");
        assert_eq!((all.len(), next.len()), (9, 0));
        let (one, _) = SECRETS.page(&state, &ask("s4"), Clone::clone).expect("one");
        assert_eq!(one[0].name, "s4");
    }
}
