// The choice of a provider and a model: a <select> with the server's list; the choice is stored.

export const DEFAULT_CHOICE = { provider: null, model: null };

async function getJson(path) {
  // no-store: `/` is also the address of this page, and the cache would return the page
  const options = { headers: { Accept: "application/json" }, cache: "no-store" };
  const response = await fetch(path, { ...options, signal: AbortSignal.timeout(10_000) });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

export class Models {
  constructor(select, store) {
    this.select = select;
    this.choice = { ...DEFAULT_CHOICE, ...store.getSetting("choice", DEFAULT_CHOICE) };
    this.choices = new Map(); // an option's value → the choice
    this.filled = ""; // the data that the <select> was filled with
    select.addEventListener("change", () => {
      this.choice = this.choices.get(select.value);
      store.setSetting("choice", this.choice);
    });
  }

  // Read the list from the server. Returns the answer of `/`.
  async load() {
    const [overview, models] = await Promise.all([getJson("/"), getJson("/v1/models")]);
    // Where keys are required, `/` has only the addresses of the faces.
    const { active_provider: active = "", providers = {} } = overview;
    const owners = models.data.map((model) => model.owned_by);
    const names = [...new Set([...Object.keys(providers), ...owners])];
    const filled = JSON.stringify([active, names, models]);
    if (this.filled !== filled) this.fill(active, names, models.data);
    this.filled = filled; // the same list is not filled again, so that an open one stays open
    return overview;
  }

  fill(active, providers, models) {
    const byProvider = new Map(providers.map((name) => [name, []]));
    for (const { id, owned_by: owner } of models) {
      if (id !== owner) byProvider.get(owner)?.push(id.slice(owner.length + 1));
    }
    this.choices = new Map([["", DEFAULT_CHOICE]]);
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
      this.choice = DEFAULT_CHOICE; // the chosen model is no longer there
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
