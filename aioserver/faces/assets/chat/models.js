// Which provider and model is asked: the server's list as a <select>, and the choice remembered.

export const SERVERS_CHOICE = { provider: null, model: null };

async function getJson(path) {
  // no-store: `/` is this page as well, and a stored answer would be shown in its place
  const options = { headers: { Accept: "application/json" }, cache: "no-store" };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(10_000) });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

export class Models {
  constructor(select, store) {
    this.select = select;
    this.choice = { ...SERVERS_CHOICE, ...store.setting("choice", SERVERS_CHOICE) };
    this.choices = new Map(); // an option's value → the choice
    this.filled = ""; // with what
    select.addEventListener("change", () => {
      this.choice = this.choices.get(select.value);
      store.set("choice", this.choice);
    });
  }

  // Ask the server what it has; gives what `/` said.
  async load() {
    const [overview, models] = await Promise.all([getJson("/"), getJson("/v1/models")]);
    // A server that wants keys says here only where its faces are.
    const { active_provider: active = "", providers = {} } = overview;
    const owners = models.data.map((model) => model.owned_by);
    const names = [...new Set([...Object.keys(providers), ...owners])];
    const filling = JSON.stringify([active, names, models]);
    if (this.filled !== filling) this.fill(active, names, models.data);
    this.filled = filling; // the same again: a list that is open stays open
    return overview;
  }

  fill(active, providers, models) {
    const byProvider = new Map(providers.map((name) => [name, []]));
    for (const { id, owned_by: owner } of models) {
      if (id !== owner) byProvider.get(owner)?.push(id.slice(owner.length + 1));
    }
    this.choices = new Map([["", SERVERS_CHOICE]]);
    const groups = [...byProvider].map(([provider, names]) => {
      const group = document.createElement("optgroup");
      group.label = names.length ? provider : `${provider} (not set up)`;
      group.disabled = names.length === 0;
      group.append(...names.map((model) => this.option({ provider, model })));
      return group;
    });
    this.select.replaceChildren(new Option(active ? `Default (${active})` : "Default", ""), ...groups);
    this.select.value = value(this.choice);
    if (this.select.selectedIndex < 0) {
      this.choice = SERVERS_CHOICE; // what was chosen is gone
      this.select.value = "";
    }
  }

  option(choice) {
    this.choices.set(value(choice), choice);
    return new Option(choice.model, value(choice));
  }
}

function value({ provider, model }) {
  return provider === null ? "" : `${provider}/${model}`;
}
